"""Model folders: open any Llama 4 folder, save one, and say where its weights came from."""

from herdling.checkpoint.card import Card, Step
from herdling.checkpoint.folder import Folder
from herdling.checkpoint.open import open_model
from herdling.checkpoint.save import save_model

__all__ = ["Card", "Folder", "Step", "open_model", "save_model"]
