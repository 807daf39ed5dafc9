//! `rollout`: watching and steering.

use std::io::{self, IsTerminal as _, Write};
use std::thread;
use std::time::{Duration, Instant};

use foreshore_protocol::AppName;
use foreshore_protocol::api::{ApplyAnswer, List, RolloutState, RolloutView};

use super::{apply, get};
use crate::arguments::{Format, Rollout};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::live::{self, Bars};
use crate::output::{self, now_ms, printable, word};

/// The shortest time between two questions while following.
const SHORTEST_PAUSE: Duration = Duration::from_millis(300);

pub(super) fn run(hub: &Hub, verb: &Rollout, format: Format, out: &mut dyn Write) -> Outcome {
    match verb {
        Rollout::Status {
            app,
            watch,
            timeout,
            id,
        } => {
            let rollout = chosen(hub, app, *id)?;
            if *watch {
                follow(hub, rollout, *timeout, format, out)
            } else {
                show(&rollout, format, out)?;
                Ok(exit_code(&rollout))
            }
        }
        Rollout::Pause { app } => steer(hub, app, "pause", format, out),
        Rollout::Resume { app } => steer(hub, app, "resume", format, out),
        Rollout::Approve { app } => steer(hub, app, "approve", format, out),
        Rollout::Retry { app, device: None } => steer(hub, app, "retry", format, out),
        Rollout::Retry {
            app,
            device: Some(device),
        } => steer(hub, app, &format!("retry?device={device}"), format, out),
        Rollout::Abort { app } => steer(hub, app, "abort", format, out),
        Rollout::OverrideLocks { app } => steer(hub, app, "override-locks", format, out),
        Rollout::OverrideWindows { app } => steer(hub, app, "override-windows", format, out),
        Rollout::Undo { app } => {
            let answer: ApplyAnswer = hub.call(
                "POST",
                &format!("/apps/{app}/undo"),
                "application/json",
                b"",
            )?;
            match format {
                Format::Json => output::json(out, &answer)?,
                Format::Name => writeln!(out, "app/{app}")?,
                Format::Table => writeln!(out, "{}", apply::sentence(&answer))?,
            }
            Ok(code::OK)
        }
        Rollout::History { app } => {
            let mut list: List<RolloutView> = hub.get(&format!("/rollouts?limit=100&app={app}"))?;
            list.items
                .sort_by_key(|rollout| std::cmp::Reverse(rollout.id));
            match format {
                Format::Json => output::json(out, &list)?,
                Format::Name | Format::Table => get::print(&list.items, format, now_ms(), out)?,
            }
            Ok(code::OK)
        }
    }
}

fn chosen(hub: &Hub, app: &AppName, id: Option<u64>) -> Result<RolloutView, Failure> {
    let Some(id) = id else {
        return get::newest(hub, app);
    };
    let rollout: RolloutView = hub.get(&format!("/rollouts/{id}"))?;
    if rollout.app != *app {
        return Err(Failure::input(format_args!(
            "rollout {id} is one of app {}, not of {app}",
            rollout.app
        )));
    }
    Ok(rollout)
}

fn steer(hub: &Hub, app: &AppName, verb: &str, format: Format, out: &mut dyn Write) -> Outcome {
    let rollout = get::newest(hub, app)?;
    let rollout: RolloutView = hub.call(
        "POST",
        &format!("/rollouts/{}/{verb}", rollout.id),
        "application/json",
        b"",
    )?;
    show(&rollout, format, out)?;
    Ok(code::OK)
}

fn show(rollout: &RolloutView, format: Format, out: &mut dyn Write) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(out, rollout)?,
        Format::Name => writeln!(out, "rollout/{}", rollout.id)?,
        Format::Table => {
            writeln!(out, "{}", live::headline(rollout, now_ms()))?;
            for wave in &rollout.waves {
                writeln!(
                    out,
                    "  wave {}: {}",
                    wave.ordinal,
                    live::wave_line(rollout, wave, now_ms())
                )?;
            }
            if let Some(tail) = live::tail_line(rollout) {
                writeln!(out, "  {tail}")?;
            }
        }
    }
    Ok(())
}

/// What the exit code says of a rollout.
fn exit_code(rollout: &RolloutView) -> u8 {
    match rollout.state {
        RolloutState::Running if live::awaits_approval(rollout) => code::PAUSED,
        RolloutState::Scheduled
        | RolloutState::Running
        | RolloutState::Completed
        | RolloutState::RollingBack => code::OK,
        RolloutState::Aborted | RolloutState::RolledBack | RolloutState::Superseded => {
            code::NEGATIVE
        }
        RolloutState::Paused | RolloutState::RollbackPaused => code::PAUSED,
    }
}

/// Follows a rollout until it ends or waits for an operator. Goes on while the hub is away.
fn follow(
    hub: &Hub,
    first: RolloutView,
    timeout: Option<Duration>,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    let begin = Instant::now();
    let (path, app) = (format!("/rollouts/{}", first.id), first.app.clone());
    let mut display = Display::new(format);
    let mut pause = SHORTEST_PAUSE;
    let mut rollout = first;
    display.show(&rollout, out)?;
    loop {
        if rollout.state.is_final() || exit_code(&rollout) == code::PAUSED {
            display.end(&rollout, out)?;
            return Ok(exit_code(&rollout));
        }
        let left = timeout.map_or(Duration::MAX, |timeout| {
            timeout.saturating_sub(begin.elapsed())
        });
        thread::sleep(pause.min(left));
        if timeout.is_some_and(|timeout| begin.elapsed() >= timeout) {
            display.end(&rollout, out)?;
            return Err(Failure::new(
                code::TIMEOUT,
                format_args!(
                    "rollout {} is still {} after {}",
                    rollout.id,
                    word(&rollout.state),
                    output::elapsed(u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX))
                ),
            )
            .hint(format_args!(
                "it goes on; follow it again with `foreshore rollout status -w {app}`"
            )));
        }
        let asked = Instant::now();
        match hub.get(&path) {
            Ok(view) => {
                rollout = view;
                display.show(&rollout, out)?;
            }
            Err(failure) if failure.is_unreachable() => display.away(hub.url()),
            Err(failure) => return Err(failure),
        }
        // A large rollout is long to tell; at most a tenth of the hub's time goes into telling it.
        pause = SHORTEST_PAUSE.max(asked.elapsed() * 9);
    }
}

/// Where following shows what it sees.
enum Display {
    /// Bars, redrawn.
    Bars(Bars),
    /// One line, or JSON object, per change.
    Lines {
        format: Format,
        last: Option<RolloutView>,
        away: bool,
    },
}

impl Display {
    fn new(format: Format) -> Self {
        if format == Format::Table && io::stdout().is_terminal() && io::stderr().is_terminal() {
            Self::Bars(Bars::new())
        } else {
            Self::Lines {
                format,
                last: None,
                away: false,
            }
        }
    }

    fn show(&mut self, rollout: &RolloutView, out: &mut dyn Write) -> Result<(), Failure> {
        match self {
            Self::Bars(bars) => bars.show(rollout, now_ms()),
            Self::Lines { format, last, away } => {
                *away = false;
                match format {
                    Format::Json if last.as_ref() != Some(rollout) => {
                        output::json_line(out, rollout)?
                    }
                    Format::Json | Format::Name => {}
                    Format::Table => {
                        for line in live::changes(last.as_ref(), rollout) {
                            writeln!(out, "{}  {}", output::timestamp(now_ms()), printable(&line))?;
                        }
                        out.flush()?;
                    }
                }
                *last = Some(rollout.clone());
            }
        }
        Ok(())
    }

    fn away(&mut self, url: &str) {
        match self {
            Self::Bars(bars) => {
                bars.say(&format!("the hub at {url} does not answer; trying again"))
            }
            Self::Lines { away, .. } if !*away => {
                eprintln!("the hub at {url} does not answer; trying again until it does");
                *away = true;
            }
            Self::Lines { .. } => {}
        }
    }

    fn end(&mut self, rollout: &RolloutView, out: &mut dyn Write) -> Result<(), Failure> {
        match self {
            Self::Bars(bars) => {
                bars.finish(rollout, now_ms());
                // The bars cut it off at the edge of the terminal.
                if let Some(message) = &rollout.message {
                    writeln!(out, "  {}", printable(message))?;
                }
            }
            Self::Lines {
                format: Format::Name,
                ..
            } => writeln!(out, "rollout/{}", rollout.id)?,
            Self::Lines {
                format: Format::Json,
                ..
            } => {}
            Self::Lines {
                format: Format::Table,
                ..
            } => writeln!(out, "{}", live::headline(rollout, now_ms()))?,
        }
        Ok(())
    }
}
