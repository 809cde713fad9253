"""The stage `curate`: which verified responses train what, decided on narrow columns."""
