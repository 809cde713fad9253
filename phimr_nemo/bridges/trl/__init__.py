"""TRL: a stage's settings and data in its form, and what runs them there. Importing this does nothing."""
