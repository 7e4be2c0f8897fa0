"""From windows of ids to a trained model: objective → step → loop."""
