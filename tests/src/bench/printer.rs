//! How figures are printed: together as a table for people, or as they come, one JSON object a line.

use fealty_disk::bench::{Figure, table};

/// Prints figures as they come (JSON) or together (the table).
#[derive(Debug)]
pub(super) struct Printer {
    json: bool,
    figures: Vec<Figure>,
}

impl Printer {
    /// One of the two ways.
    pub(super) fn new(json: bool) -> Self {
        Self { json, figures: Vec::new() }
    }

    /// Says what the figures were measured on; beside the JSON lines, not among them.
    pub(super) fn machine(&self, description: &str) {
        if self.json {
            eprintln!("{description}");
        } else {
            println!("{description}\n");
        }
    }

    /// Adds a figure.
    pub(super) fn add(&mut self, figure: Figure) {
        if !self.json {
            self.figures.push(figure);
            return;
        }
        match serde_json::to_string(&figure) {
            Ok(line) => println!("{line}"),
            Err(error) => eprintln!("bench: {}: {error}", figure.name()),
        }
    }

    /// Prints the table.
    pub(super) fn finish(&self) {
        if !self.json {
            println!("{}", table(&self.figures));
        }
    }
}
