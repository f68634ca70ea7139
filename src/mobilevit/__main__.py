"""`python -m mobilevit` is `mobilevit`."""

from mobilevit.cli import main

if __name__ == "__main__":
    main()
