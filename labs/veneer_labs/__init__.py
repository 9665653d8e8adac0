"""Small experiments (`veneer-train lab`) and data sets (`veneer-train data`)."""
