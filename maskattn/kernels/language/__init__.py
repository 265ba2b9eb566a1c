"""What every kernel is written with: tiles of rows, the score, the softmax and dropout."""
