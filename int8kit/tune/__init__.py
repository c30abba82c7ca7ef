"""Tuning: the legal configurations (`space`), a card that is not here (`offline`), timing (`measure`), the choice
(`search`) and the processes that compile (`workers`)."""
