"""Pages, tables and pictures of what runs have left; the model card and the release."""
