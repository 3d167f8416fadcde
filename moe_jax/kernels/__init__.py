"""Code written for speed, each piece beside its plain reference."""
