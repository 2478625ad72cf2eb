"""The trials of a sweep: what they are called, what a person sees of them, and what is left of them in one table."""
