"""``python -m memgen_lens``: the same as ``memgen-lens``."""

from memgen_lens.cli import main

if __name__ == "__main__":
    main()
