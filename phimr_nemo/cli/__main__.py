"""`python -m phimr_nemo.cli` is `phimr`."""

from phimr_nemo.cli.main import main

main()
