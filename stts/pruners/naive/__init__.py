"""Plain loops that say what each method means; the fast methods are tested and timed against them."""
