"""Label smoothing and Mixup, studied: data models, losses, trainers, exact theory and the tools that build the book."""
