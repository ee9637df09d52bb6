"""What the parts cost, measured; see README.md here."""
