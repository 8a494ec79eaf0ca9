"""The one error of this room."""


class ConfigError(ValueError):
    """What is described cannot be served; the text names the field and the way out."""
