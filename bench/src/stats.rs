//! Medians.

/// The value below which this share of the values is; 0 when there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * share).round() as usize)
        .copied()
        .unwrap_or_default()
}

/// The median.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// A line of a table: name, median, 90th percentile, and the ratio of the median to a base.
pub fn line(name: &str, values: &[f64], unit: &str, base: f64) {
    let (middle, high) = (median(values), quantile(values, 0.9));
    let digits = if middle < 10.0 { 3 } else { 1 };
    println!(
        "| {name} | {middle:.digits$} {unit} | {high:.digits$} {unit} | {:.2} |",
        middle / base
    );
}

/// The head of a table.
pub fn head(what: &str) {
    println!("\n| {what} | median | p90 | ratio |\n|---|--:|--:|--:|");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(
            [median(&values), quantile(&values, 0.0), quantile(&values, 1.0)],
            [3.0, 1.0, 5.0]
        );
        assert_eq!(median(&[]), 0.0);
    }
}
