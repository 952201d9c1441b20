"""What goes into a model: text, chat, images and video as tokens and tiles."""
