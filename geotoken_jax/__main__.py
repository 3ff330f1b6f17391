"""Makes `python -m geotoken_jax` the same as `geotoken`."""

from geotoken_jax import cli

if __name__ == "__main__":
    cli.main()
