"""What commands share to show results: tables of text, JSON files, and the style of pictures."""
