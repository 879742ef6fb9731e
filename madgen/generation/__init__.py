"""`trainer.predict` over what is missing. The only home of Lightning."""
