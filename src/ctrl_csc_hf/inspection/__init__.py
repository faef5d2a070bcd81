"""What is inside a model: numbers, pictures, a page."""
