"""From prompts to text: prompt → batches → cache → liquid tail → samples."""
