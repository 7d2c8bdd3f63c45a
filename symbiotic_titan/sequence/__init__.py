"""The sequence contract: what data produces and the model consumes."""
