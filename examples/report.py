"""What reports of exact and MuSe attention share: their names and colours."""

NAMES = {"exact": "exact attention", "muse": "MuSe attention"}
COLORS = {"exact": "#3b6ea5", "muse": "#d1603d"}
