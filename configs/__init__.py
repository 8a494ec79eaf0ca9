"""What a deployment is: frozen, validated dataclasses and the presets."""
