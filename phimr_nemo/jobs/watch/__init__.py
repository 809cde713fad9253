"""A pipeline while it runs: its steps in their order, what it scores, how long it will take, what it says."""
