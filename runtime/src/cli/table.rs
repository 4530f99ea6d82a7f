//! Tables for terminals.

use std::io::Write;

/// Which side of its column a cell keeps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// For texts.
    Left,
    /// For numbers.
    Right,
}

/// A table whose columns are as wide as they need to be.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Table {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. Control characters in cells are shown as `?`: names come from anywhere.
    pub fn row(&mut self, cells: Vec<String>) {
        let clean = |cell: String| {
            cell.chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        };
        self.rows.push(cells.into_iter().map(clean).collect());
    }

    /// Writes it.
    ///
    /// # Errors
    /// The channel's.
    pub fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let heading: Vec<String> = self.columns.iter().map(|(name, _)| (*name).to_string()).collect();
        let widths: Vec<usize> = (0..heading.len())
            .map(|i| {
                let cells = std::iter::once(&heading)
                    .chain(&self.rows)
                    .filter_map(|row| row.get(i));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        for row in std::iter::once(&heading).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                let width = *width;
                match align {
                    Align::Left => line += &format!("{cell:<width$}  "),
                    Align::Right => line += &format!("{cell:>width$}  "),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A size for people: three digits and a unit.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "K", "M", "G", "T"] {
        if value < 999.5 {
            return if unit == "B" || value >= 99.5 {
                format!("{value:.0}{unit}")
            } else {
                format!("{value:.1}{unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.0}P")
}

/// A CPU time for people.
pub fn cpu_time(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{s}.{:02}s", ms % 1000 / 10),
        60..3600 => format!("{}:{:02}", s / 60, s % 60),
        _ => format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60),
    }
}

/// A number of times per second for people.
pub fn rate(per_s: f64) -> String {
    match per_s {
        r if !r.is_finite() || r < 0.05 => "0".into(),
        r if r < 99.5 => format!("{r:.1}"),
        r if r < 99_950.0 => format!("{r:.0}"),
        r => format!("{:.0}k", r / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("PID", Align::Right), ("NAME", Align::Left), ("X", Align::Left)]);
        table.row(vec!["7".into(), "a\x1b[2J".into(), "1".into()]);
        table.row(vec!["12345".into(), "long".into(), String::new()]);
        let mut text = Vec::new();
        table.write(&mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "  PID  NAME   X\n    7  a?[2J  1\n12345  long\n"
        );
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            [0, 999, 1000, 1536, 150 << 20, 3 << 40].map(bytes),
            ["0B", "999B", "1.0K", "1.5K", "150M", "3.0T"]
        );
        assert_eq!(
            [0, 1230, 61_000, 3_661_000].map(cpu_time),
            ["0.00s", "1.23s", "1:01", "1:01:01"]
        );
        assert_eq!(
            [0.0, 1.25, 150.0, 123_456.0, f64::NAN].map(rate),
            ["0", "1.2", "150", "123k", "0"]
        );
    }
}
