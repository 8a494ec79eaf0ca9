"""The one error of this room."""


class ConfigError(ValueError):
    """A deployment or model description that cannot be served; the text names the field and the way out."""
