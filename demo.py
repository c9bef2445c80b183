"""Ask about a picture: `python demo.py [--checkpoint DIR] [--image FILE --ask "..."]`; see qwenvl_jax/demo."""

from qwenvl_jax.demo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
