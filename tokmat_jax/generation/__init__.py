"""From prompts to text: prompt → requests → cache → liquid tail → samples."""
