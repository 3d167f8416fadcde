"""A whole experiment: arms, their stages, controls, and one table of results."""
