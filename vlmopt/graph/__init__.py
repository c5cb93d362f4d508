"""Questions about torch.fx graphs and edits of them. Structure only: no model is known by name here."""
