//! How far a device's pull is, in words.

use foreshore_protocol::api::{ImagePullState, ImagePullView, PullView};

use crate::output::{bytes, elapsed, printable};

/// In a few words, for a line with others: `45%, 12.0s left`. Empty when there is nothing to tell yet.
pub(crate) fn brief(pull: &PullView) -> String {
    current(pull).map_or_else(String::new, |image| match image.remaining_s {
        Some(seconds) => format!("{}, {} left", percent(image), left(seconds)),
        None => percent(image),
    })
}

/// For a line of its own: `demo:v2, image 1 of 2: 45% of 12.0 MiB, 1.0 MiB/s, 7s left`.
pub(crate) fn whole(pull: &PullView) -> String {
    let Some(image) = current(pull) else {
        return "asking for images".to_owned();
    };
    let number = pull
        .images
        .iter()
        .take_while(|other| other.state == ImagePullState::Staged)
        .count()
        + 1;
    let left = image.remaining_s.map_or_else(
        || ", nothing comes".to_owned(),
        |seconds| {
            let rate = bytes(pull.rate_bytes);
            format!(", {rate}/s, {} left", left(seconds))
        },
    );
    format!(
        "{}, image {number} of {}: {} of {}{left}",
        printable(&image.image),
        pull.images.len(),
        percent(image),
        bytes(image.total_bytes.unwrap_or_default()),
    )
}

fn left(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        _ => elapsed(seconds.saturating_mul(1000)),
    }
}

fn current(pull: &PullView) -> Option<&ImagePullView> {
    pull.images
        .iter()
        .find(|image| image.state == ImagePullState::Fetching)
}

fn percent(image: &ImagePullView) -> String {
    let (fetched, total) = (image.fetched_bytes, image.total_bytes);
    let percent = match total {
        Some(total @ 1..) => u128::from(fetched.unwrap_or_default()) * 100 / u128::from(total),
        // All of it was there already.
        _ => 100,
    };
    format!("{percent}%")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::samples;

    #[test]
    fn in_words() {
        let mut pull = samples::pull();
        assert_eq!(brief(&pull), "45%, 1m10s left");
        assert_eq!(
            whole(&pull),
            "registry.example/web:2, image 2 of 3: 45% of 64.0 MiB, 512.0 KiB/s, 1m10s left"
        );
        pull.images[1].remaining_s = None;
        assert_eq!(brief(&pull), "45%");
        assert!(whole(&pull).ends_with("45% of 64.0 MiB, nothing comes"));
        pull.images[1].total_bytes = Some(0);
        assert_eq!(brief(&pull), "100%");
        pull.images.truncate(1);
        assert_eq!((&*brief(&pull), &*whole(&pull)), ("", "asking for images"));
    }
}
