"""Learning rate as a pure function of the tokens trained. Needs nothing but the standard library and numpy."""
