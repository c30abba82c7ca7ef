"""Verification: what is drawn (`strategies`), what must hold (`checks`), and another card's code here (`foreign`)."""
