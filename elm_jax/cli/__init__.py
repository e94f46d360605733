"""The command `elm-jax`: one thin module per command."""
