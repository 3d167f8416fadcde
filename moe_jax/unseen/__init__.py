"""Tasks that the model was not trained on: representations and adaptation."""
