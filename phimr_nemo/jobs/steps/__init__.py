"""Commands of `phimr` that make a recipe: what one is, and how several run one after the other and side by side."""
