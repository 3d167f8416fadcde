"""Tasks that the model was not trained on: representations and few-shot adaptation."""
