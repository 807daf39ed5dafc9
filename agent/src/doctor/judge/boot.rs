//! How to change the kernel's command line on this device: every boot loader has its own place for it.

use crate::doctor::facts::Host;

/// The one line that the firmware of a Raspberry Pi passes on, in the order they are looked for.
const RASPBERRY_PI: [&str; 3] = [
    "/boot/firmware/cmdline.txt",
    "/media/mmcblk0p1/cmdline.txt",
    "/boot/cmdline.txt",
];

/// Elsewhere: the file, the sed script that adds `WORDS`, and what makes it take effect.
const OTHERS: [(&str, &str, &str); 5] = [
    ("/boot/armbianEnv.txt", "s/^extraargs=/&WORDS /", ""),
    (
        "/etc/update-extlinux.conf",
        "s/^default_kernel_opts=\"/&WORDS /",
        "update-extlinux && ",
    ),
    (
        "/boot/extlinux/extlinux.conf",
        "s/^[[:space:]]*append .*/& WORDS/I",
        "",
    ),
    (
        "/etc/default/grub",
        "s/^GRUB_CMDLINE_LINUX=\"/&WORDS /",
        "update-grub && ",
    ),
    (
        "/etc/kernel/cmdline",
        "1s/$/ WORDS/",
        "kernel-install add-all && ",
    ),
];

/// Every file that [`Host::boot_files`] may hold.
pub(crate) fn files() -> impl Iterator<Item = &'static str> {
    let others = OTHERS.iter().map(|(file, _, _)| *file);
    RASPBERRY_PI.into_iter().chain(others)
}

/// How to have `words` on it at the next boot.
pub(super) fn add(host: &Host, words: &str) -> String {
    if host.is_raspberry_pi() {
        let file = raspberry_pi_file(host);
        let there = host.boot_files.get(file).is_some_and(|text| {
            words
                .split(' ')
                .all(|word| text.split_whitespace().any(|found| found == word))
        });
        if there {
            return format!(
                "reboot: {file} has \"{words}\" already, the running kernel was not started with it"
            );
        }
        return format!(
            "append \"{words}\" to the one line in {file} and reboot: sed -i '1s/$/ {words}/' {file} && reboot"
        );
    }
    match OTHERS
        .iter()
        .find(|(file, _, _)| host.boot_files.contains_key(*file))
    {
        Some((file, script, apply)) => {
            let script = script.replace("WORDS", words);
            format!(
                "put \"{words}\" on the kernel's command line and reboot: sed -i '{script}' {file} && {apply}reboot"
            )
        }
        None => format!(
            "put \"{words}\" on the kernel's command line, in the configuration of the boot loader, and reboot"
        ),
    }
}

/// How to be rid of `word` at the next boot.
pub(super) fn remove(host: &Host, word: &str) -> String {
    let holds = |file: &str| {
        let text = host.boot_files.get(file);
        text.is_some_and(|text| text.contains(word))
    };
    let found = files().find(|file| holds(file));
    let Some(file) = found else {
        return format!(
            "take \"{word}\" off the kernel's command line, in the configuration of the boot loader, and reboot"
        );
    };
    let apply = OTHERS
        .iter()
        .find(|(other, _, _)| *other == file)
        .map_or("", |(_, _, apply)| apply);
    format!(
        "take \"{word}\" off the kernel's command line and reboot: sed -i 's/ *{word}//' {file} && {apply}reboot"
    )
}

fn raspberry_pi_file(host: &Host) -> &'static str {
    RASPBERRY_PI
        .into_iter()
        .find(|file| host.boot_files.contains_key(*file))
        .unwrap_or("/boot/firmware/cmdline.txt")
}
