"""Items that are measured or counted instead of trained, by kind: `function(place, folder, command, progress)`."""

from .parameters import parameters


MEASURED = {"parameters": parameters}
