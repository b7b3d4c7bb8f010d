"""What people look at: pictures of an evaluation. No torch."""
