"""What the rehearsal makes for itself: documents, packed rows, a base model."""
