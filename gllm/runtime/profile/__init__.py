"""`profile`: how long the ordinary workers take for steps made by hand, as tables that a simulator composes."""
