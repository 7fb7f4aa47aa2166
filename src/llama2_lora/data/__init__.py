"""GovReport as training reads it, and the forms that it is converted from."""
