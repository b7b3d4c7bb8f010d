"""Diagnosis: measure why the rollouts of one model on one dataset diverge, and write a page with the results."""
