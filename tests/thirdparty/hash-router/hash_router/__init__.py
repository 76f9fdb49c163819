"""Hash routing: a token goes to experts that follow from its id."""
