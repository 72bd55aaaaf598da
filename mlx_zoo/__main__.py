"""`python -m mlx_zoo`."""

from mlx_zoo.cli import main

if __name__ == "__main__":
    main()
