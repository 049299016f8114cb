"""``python -m qquant``: the same as the console script ``qquant``."""

from qquant.cli import main

if __name__ == "__main__":
    main()
