//! An error with what caused it, as one line for people.

use std::error::Error;

/// The error's text and those of all its causes, outermost first, with colons between.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}
