"""How fast data are read, beside other ways to read them."""
